"""The paper's experiments as cells: planned, run once each, and put into tables and figures. `make paper`."""
