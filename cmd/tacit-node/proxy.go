package main

import "context"

// runProxy is the proxy's flags, Config and Run.
func runProxy(ctx context.Context, args []string) error { return nil }
