"""How is a concept scrubbed from a network of which only losses are known? Section 2 of the paper, in torch alone.

Wu & Harandi, "Scissorhands: Scrub Data Influence via Connection Sensitivity in Networks", ECCV 2024, arXiv 2401.06187.

    task.py         what a model has to offer: batches, losses, and how its parameters are divided among ranks
    sensitivity.py  which connections carry the concept       Eq. 1-2 and the global top-k
    trim.py         re-initialise them                        Algorithm 1, first half
    projection.py   a step that cannot bring the concept back Eq. 4-5 in closed form
    repair.py       retrain the rest                          Algorithm 1, second half
    descent.py      the loop of every other method that takes steps along a gradient
    optimizers.py   optimizers by name, and the rounding of bf16 weights

code          paper
theta         theta, the parameters
s             s, connection sensitivity (Eq. 2)
g_f, g_r      gradients of the forget loss L_f and of the retain loss L_r
g_o           g_o, gradient of the objective L_r - lam L_f (Eq. 3)
lam           lambda
v             v, multiplier of the constraint <g, g_f> <= 0 (Eq. 5)
c             lam + v: everything the step subtracts along g_f
"""
