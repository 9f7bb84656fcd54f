"""What a run shows of itself: its log, boards, MFU, retention and samples."""
