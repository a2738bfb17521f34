"""Does a classifier forget what it should? The core and the general methods of `erase_sd` on images with labels.

train        train the original model
unlearn      make it forget
benchmark    every method against Retrain, the paper's Table 1
ablation     what each part of Scissorhands contributes, the paper's Table 3 and Fig. 2
search       choose every method's options on validation data
speed        what the closed form of the projection saves
settings     the options that belong to no method
presets      named values of the options, the released code's and ours
plan         from what was asked for to every value of a run
task         a classifier as a Task of the core: forget, retain and redirect losses
data         which examples a run sees
models       the networks, plain torch
methods      the methods that need more than these losses
metrics      accuracies, membership inference, gap to Retrain
run          how a run is carried out and measured
reporting    tables and plots
"""
