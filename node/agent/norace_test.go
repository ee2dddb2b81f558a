//go:build !race

package agent

// cycles of ten pods each: a thousand enrollments in all.
const cycles = 100
