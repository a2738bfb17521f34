"""How far are two folders of images apart?

    extractors   networks that turn images and texts into feature vectors, by name
    cache        features and statistics of a folder, computed once
    distances    Fréchet, kernel and CLIP-MMD distance and cosines, as pure functions
    metrics      what each metric needs and what it says of a folder

Broken images have no features: they are counted and left out.
"""
