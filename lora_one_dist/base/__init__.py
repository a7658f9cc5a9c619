"""The frozen model: skeleton, targets, files, partitions, recomputation, loss.  Uses config, cluster, disk."""
