package table

import (
	"bytes"
	"math"
	"strings"
	"testing"
)

func TestBounds(t *testing.T) {
	for _, tt := range []struct {
		bound Bound
		met   bool
		line  string
	}{
		{Bound{Name: "a", Value: 2, Limit: 1.8, Least: true, Aim: 2.5}, true, "a 2.00 at least 1.8 met aim 2.5 80% of it"},
		{Bound{Name: "b", Value: 1.7, Limit: 1.8, Least: true}, false, "b 1.70 at least 1.8 NOT MET"},
		{Bound{Name: "c", Value: 40, Limit: 40, Aim: 32}, true, "c 40.0 at most 40 met aim 32 80% of it"},
		{Bound{Name: "d", Value: 0.4, Limit: 0.6, Aim: 0.5}, true, "d 0.40 at most 0.6 met aim 0.5 125% of it"},
		{Bound{Name: "e", Value: math.NaN(), Limit: 1, Aim: 0.5}, false, "e - at most 1 NOT MET aim 0.5 -"},
	} {
		var out bytes.Buffer
		met := Table{To: &out, Width: 4}.Bounds([]Bound{tt.bound})
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		if line := strings.Join(strings.Fields(lines[len(lines)-1]), " "); met != tt.met || line != tt.line {
			t.Errorf("%+v: met %v, printed %q; want %v, %q", tt.bound, met, line, tt.met, tt.line)
		}
	}
}
