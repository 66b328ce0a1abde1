"""`python -m taper` is `taper`."""

from taper.cli.main import main

if __name__ == "__main__":
    main()
