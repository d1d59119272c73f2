"""Line 7: pictures and pages from run directories."""
