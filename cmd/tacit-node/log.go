package main

import (
	"fmt"
	"log/slog"
	"os"
)

// logTo is the logger that the flags --log-format and --log-level ask for.
func logTo(format, level string) (*slog.Logger, error) {
	var o slog.HandlerOptions
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("--log-level: %w", err)
	}
	o.Level = l
	switch format {
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, &o)), nil
	case "text":
		return slog.New(slog.NewTextHandler(os.Stderr, &o)), nil
	}
	return nil, fmt.Errorf("--log-format %q: want json or text", format)
}
