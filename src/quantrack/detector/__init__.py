"""Load an Ultralytics detector safely, choose its head, fold BatchNorm; only this room knows Ultralytics."""
