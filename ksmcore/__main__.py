"""`python -m ksmcore`, the same as the script `ksmcore`."""

from ksmcore.cli import main

if __name__ == "__main__":
    main()
