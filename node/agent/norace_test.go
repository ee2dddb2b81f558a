//go:build !race

package agent

// cycles of ten pods each: a thousand enrolments in all.
const cycles = 100
