"""A finished run as one self-contained HTML page. (report.json is `gptq_cli.results.document.document`.)

svg.py    plots: points and lines over an axis, as inline SVG
page.py   report_html(report): the page
"""
