"""The edge of the program: arguments in, exit codes out. Floor 4: nothing below imports it.

app.py          main(argv): the only place that turns errors into exit codes
options.py      every option once, with its environment variable
preset.py       --config FILE.toml
output.py       what goes to stdout, what goes to stderr
failure.py      an error as text and as JSON
quantize.py  load.py  inspect_map.py      one file a subcommand: parse, build the job, call jobs, show
"""
