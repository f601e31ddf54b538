"""The commands of `infc`, a file each; nothing heavy is imported before a command runs."""
