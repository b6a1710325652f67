"""Object detection: scenes with boxes, detectors of every kind, COCO's average precision."""
