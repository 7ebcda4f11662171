"""Commands, one short file each; the command line imports them when they are called."""
