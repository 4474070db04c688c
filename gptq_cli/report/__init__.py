"""Results as HTML pages that can be mailed, and the model card. (report.json is `results.document`.)"""
