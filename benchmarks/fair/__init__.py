"""Compare ways to prune a network under equal conditions: docs/fair.md.

    python -m benchmarks.fair --data-dir FOLDER    # all cells: hours to days on one core
    python -m benchmarks.fair --networks resnet8 --methods slimming --budgets 50% --seeds 0
    python -m benchmarks.fair --draw               # the page and its figures, of existing results

A cell is a network, a method, a budget of MACs and a seed. All cells of a network train on the same data,
batches and augmentation with the same optimizer and schedule for the same total number of epochs,
the training of the dense network included. The epoch that is best on the validation split is kept, and the
test split is looked at once, when the cell is complete. Costs are those of
`pruning.planning.cost.deployed_cost`, times those of ONNX Runtime.

Cells are added to one results file and not computed again. Several processes may fill the same file: a cell
is locked while it is computed. An interrupted cell is resumed from its last epoch.
"""
