"""`python -m llamajax VERB ...` is `llamajax VERB ...`."""

from llamajax.cli import main

if __name__ == "__main__":
    main()
