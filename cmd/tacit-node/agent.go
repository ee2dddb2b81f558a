package main

import "context"

func runAgent(ctx context.Context, args []string) error { return nil }
