"""What does a network remember of the forget set, and what does it still know of the rest?

accuracy    logits of a set of images, and the share of them that is right
mia         does an SVC on confidences take the forget set for training data?   the paper's MIA
scores      all that is measured on a network after a run
lira        can a likelihood ratio tell unlearned from never trained, example by example?
distance    how far the outputs are from Retrain's
gap         Avg. Gap to Retrain, ToW and RTE, and the paper's own tables
relearn     how many epochs bring the forget set back
gradcam     where the model looks

Accuracies and MIA are shares in [0, 1], except in the paper's tables, which are in %.
"""
