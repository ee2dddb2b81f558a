//go:build race

package agent

// cycles of ten pods each: the race detector has seen all after a few.
const cycles = 10
