"""From raw outputs to boxes, COCO metrics, plots and sample pictures."""
