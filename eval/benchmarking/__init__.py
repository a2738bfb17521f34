"""How do the erasing methods compare on the embedded model?

suites.py      the tables people edit: methods, concepts, seeds, the ablation
rows.py        one method on one concept with one seed: its key, and where its result is stored and published
trial.py       run one row: erase, sample, evaluate with the oracle
aggregate.py   results of rows -> scores of methods, pooled FID and KID, the Pareto front
tables.py      CSV and Markdown of the scores
plots.py       erasure against retention, and the grid of samples
"""
