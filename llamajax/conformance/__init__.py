"""The doctor's probes of a backend, run in processes of their own, and what follows from them."""
