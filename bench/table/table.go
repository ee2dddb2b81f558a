// Package table prints what a bench has measured, and whether its bounds are met.
package table

import (
	"fmt"
	"io"
	"math"
)

// Bound is what a figure may be.
type Bound struct {
	Name  string
	Value float64 // NaN if it was not measured: then no bound is met
	Limit float64
	Least bool    // Limit is the least value, not the most
	Aim   float64 // a value that is better than Limit, and wanted; 0 if there is none
}

// Met reports whether it is so.
func (b Bound) Met() bool {
	if b.Least {
		return b.Value >= b.Limit
	}
	return b.Value <= b.Limit
}

// Near is how much of the aim is reached: 1 or more if it is.
func (b Bound) Near() float64 {
	if b.Least {
		return b.Value / b.Aim
	}
	return b.Aim / b.Value
}

// Table is a table of text.
type Table struct {
	To io.Writer
	// Width is that of the first column, in characters.
	Width int
}

// Row prints one line.
func (t Table) Row(name string, cells ...string) {
	fmt.Fprintf(t.To, "%-*s", t.Width, name)
	for _, c := range cells {
		fmt.Fprintf(t.To, " %14s", c)
	}
	fmt.Fprintln(t.To)
}

// Bounds prints all of the list, and reports whether every one is met.
func (t Table) Bounds(list []Bound) bool {
	fmt.Fprintln(t.To)
	t.Row("bounds", "measured", "limit")
	met := true
	for _, b := range list {
		verdict, sign := "met", "at most"
		if b.Least {
			sign = "at least"
		}
		if !b.Met() {
			verdict, met = "NOT MET", false
		}
		cells := []string{Number(b.Value), fmt.Sprintf("%s %g", sign, b.Limit), verdict}
		if b.Aim != 0 {
			cells = append(cells, fmt.Sprintf("aim %g", b.Aim), percent(b.Near()))
		}
		t.Row(b.Name, cells...)
	}
	return met
}

func percent(v float64) string {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return "-"
	}
	return fmt.Sprintf("%.0f%% of it", 100*v)
}

// Number has three digits that say something.
func Number(v float64) string {
	switch {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return "-"
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}
