"""What a run will take, from the program that it would run: memory, communication, time."""
