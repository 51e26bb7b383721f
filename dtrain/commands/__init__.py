"""One file a command; each has `main(arguments) -> int` and imports what is slow only when run."""
