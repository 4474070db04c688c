"""The edge of the program: arguments in, exit codes out. Nothing below imports it."""
