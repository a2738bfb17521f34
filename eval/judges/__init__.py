"""Who looks at images, and by which rules does it count?

    detections   boxes of NudeNet, stored once for every image
    nudenet      the network itself, with its published pre- and postprocessing
    protocols    the rules of counting in use, by name
    review       sheets of flagged boxes and a table for a person's verdicts
    naming       which of several things a picture shows: CLIP zero-shot, ImageNet's classes, the oracle
    oracle       the pocket world's classifier, and UnlearnCanvas's rates of what it sees
    censor       what of an image may be shown

A broken image stays in every denominator and counts as clean or forgotten nowhere.
"""
