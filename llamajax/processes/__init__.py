"""What the processes of a run tell each other: who is there, what differs, what they decide."""
