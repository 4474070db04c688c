"""`python -m gptq_cli`."""

from gptq_cli.cli.app import main

if __name__ == "__main__":
    raise SystemExit(main())
