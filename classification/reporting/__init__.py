"""How are results shown? Tables and plots of the benchmark and of the ablations.

tables               from records of runs to rows, CSV and Markdown
figures              the plots
paper_tables.csv     Tables 1 and 2 of the paper
paper_ablation.csv   Table 3 of the paper
"""
