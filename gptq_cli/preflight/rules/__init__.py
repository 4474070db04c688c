"""One module a subject, one function a rule: facts in, findings out."""
