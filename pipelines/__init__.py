"""COCO to Arrow shards and back: packing, streaming order, samples, batches, evaluation."""
