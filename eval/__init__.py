"""What do images and checkpoints show? Commands, `python -m eval.NAME`, that know nothing about methods.

    generate      prompts x seeds -> a folder of images
    nudity        NudeNet on folders, counted under any of the protocols in use
    quality       CLIP score, FID, KID, CMMD and same-seed drift of folders
    concepts      the pocket oracle on folders: UA, IRA, CRA
    grid          contact sheets: rows are prompts, columns are models
    report        runs and folders on one page
    judge         models -> samples -> counts -> one table, by a published protocol
    benchmark     suites of methods, concepts and seeds: rows, tables, plots
    selectivity   which weights a sensitivity singles out
    speed         our ways of computing against the usual ones

    images/  judges/  features/        folders of images, who looks at them, and how far two of them are apart
    reporting/  benchmarking/  timing/  what report, benchmark and speed are made of

What is measured is stored once, as it was seen. A folder of images (`eval.images.folder` reads it) holds

    generation.json   what the images depend on: model, networks, prompts, sampler, steps, guidance, versions, device
    manifest.jsonl    one line an image, in the order of the prompts: file, row, prompt, seed, broken, sha256, ...
    00012_4889.png    row and seed; prompts stay out of file names
    detections.jsonl  every box of every image, whatever its score                         eval.nudity
    nudity.json  quality.json  concepts.json  grid.png                                     the judges' results

Write `from eval import x`: a bare `import eval` hides Python's builtin.
"""
