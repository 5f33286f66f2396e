"""`python -m jobs` is `shardmill`."""

from jobs.cli import main

if __name__ == "__main__":
    main()
