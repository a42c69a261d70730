"""Where the build puts the compiled CPU library."""
