"""How is a run of any method on any task carried out so that nothing is lost?

loop         execute: open the folder, resume, run, check, finish
folder       one configuration, one process, one truth about how it ended
checkpoints  whole or passed over
record       run.json and status.json
plots        the trace of the steps and the map of the trim
"""
