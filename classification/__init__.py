"""Unlearning in image classifiers: the core and the general methods of `erase_sd` on CIFAR, SVHN, faces and digits.

data         what a data set is, and where it comes from: a folder in its original format, the Hub, or scikit-learn
splits       which examples train, validate and are to be forgotten, reproducibly
transforms   crops and flips on tensors
models       the networks, plain torch
task         a classifier as a Task of the core: forget, retain and redirect losses
methods      the methods that need more than these losses
metrics      accuracies, membership inference, gap to Retrain
train, unlearn, benchmark, ablation    the commands
"""
