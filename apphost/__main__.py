"""`python -m apphost`: the same program as `apphost`."""

from apphost.start import main

if __name__ == "__main__":
    main()
