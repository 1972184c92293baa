"""One file per architecture: each declares `FAMILY`, which says where the units of its blocks are."""
