"""COCO-layout pictures and annotations: read, digested, letterboxed."""
