"""One model on several devices: the engines, and the ranks that go through a run together."""
