"""Preflight: what can be known about a job before a weight is read. It never prints and never raises.

    facts.py                the skeleton, the output and the environment as plain facts
    units.py  planner.py    blocks and other modules -> a placement (`auto` and its kin, or a map's rules)
    budget.py               how many bytes each device will need at its highest moment, with the formulae
    remedies.py             what would make it fit, cheapest first
    rules_*.py              one function a rule: facts -> findings; its docstring is what `--explain` prints
    catalogue.py            all rules by id
    resolve.py  check.py  report.py    the entry points

How a job uses it:

    from gptq_cli.devices.accelerators import present_devices
    from gptq_cli.preflight.cases import Work
    from gptq_cli.preflight.check import check_quantize
    from gptq_cli.preflight.facts import capabilities, environment_facts, model_facts, output_facts
    from gptq_cli.preflight.resolve import refusal, resolve
    from gptq_cli.preflight.report import map_report

    facts = model_facts(skeleton)
    work = Work(job.quantize, job.calibration)     # None: nothing to quantize
    budgets = job.devices or present_devices()
    resolution = resolve(job.device_map, facts, budgets, max_memory=job.max_memory, work=work,
                         environment=environment_facts(), given=job.devices is not None)
    devices = resolution.placement.devices if resolution.placement else ()
    report = resolution.report + check_quantize(
        facts, work, problems=skeleton.problems, output=output_facts(job.out, skeleton.files.directory),
        overwrite=job.overwrite, devices=devices, capabilities=capabilities(devices))
    if not report.ok: raise refusal(report)                 # a ValueError as well where disk is involved
    ... resolution.placement, resolution.parked, resolution.devices (predicted bytes a device) ...
    map_report(facts, resolution, report=report, spec=job.device_map, ...)   # inspect-map and --dry-run
"""
