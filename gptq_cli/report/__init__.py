"""A finished run as one self-contained HTML page. (report.json is `gptq_cli.results.document.document`.)"""
