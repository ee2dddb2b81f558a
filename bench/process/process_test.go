package process

import (
	"os"
	"testing"
)

func TestParseStat(t *testing.T) {
	for _, tt := range []struct {
		text string
		want stat
		ok   bool
	}{
		{"7 (tacit-node) S 3 7 7 0 -1 4194304 9 0 0 0 120 34 0 0 20 0 5 0 1 2 3", stat{parent: 3, ticks: 154}, true},
		{"7 (a ) b (c) S 3 7 7 0 -1 4194304 9 0 0 0 1 2 0 0", stat{parent: 3, ticks: 3}, true},
		{"7 (a) S 3", stat{}, false},
		{"7 a S 3 7 7 0 -1 4194304 9 0 0 0 1 2 0 0", stat{}, false},
		{"", stat{}, false},
	} {
		got, err := parseStat([]byte(tt.text))
		if got != tt.want || (err == nil) != tt.ok {
			t.Errorf("parseStat(%q) = %v, %v; want %v", tt.text, got, err, tt.want)
		}
	}
}

func TestDescendantsFindNobodyBelowALeaf(t *testing.T) {
	me, err := Descendants(os.Getppid())
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := me[os.Getpid()]; !ok {
		t.Errorf("this process is not below its parent: %v", me)
	}
	none, err := Descendants(os.Getpid())
	if err != nil || len(none) != 0 {
		t.Errorf("below this process are %v, %v; want nobody", none, err)
	}
}
