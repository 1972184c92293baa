"""One file per architecture: each declares `FAMILY`, which says where the units of its blocks are.

Measurement (`units.discover`) finds the same layers, rows, tables, norms, readers, residual streams and scales;
tests/units/discover/test_groups.py holds both equal. They are declared all the same because a declaration needs no
weights and no pass: a dry run names the units of a model that is not downloaded, a saved model loads without being
measured, every process of a run has the structure at once, and finished runs keep their plans. Counts, widths and rows
are not declared: `units.inside` reads them off the layers.

What measurement cannot know, and a family therefore has to say: which sub-layer may go as a whole and what is then
bypassed; streams that a block's own code cuts into windows (swin, mask2former) or pads (resnet); a table by head that
all blocks share (mpnet); sizes that only other versions of a library read; channels of residual streams (resnet); how
tokens may be merged (bert, vit); the block to which a group belongs, and that gates, projections and classifiers are
left whole.
"""
