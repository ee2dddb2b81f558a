package lab

import "testing"

// A name that nobody knows has no sum, which would be below any bound.
func TestSum(t *testing.T) {
	const text = `# TYPE open gauge
open{kind="mutual_tls",direction="inbound"} 2
open{kind="mutual_tls",direction="outbound"} 3
open{kind="plaintext",direction="inbound"} 4
`
	for _, test := range []struct {
		name   string
		labels []option
		sum    float64
		ok     bool
	}{
		{"open", nil, 9, true},
		{"open", []option{{"kind", "mutual_tls"}}, 5, true},
		{"open", []option{{"kind", "mutual_tls"}, {"direction", "inbound"}}, 2, true},
		{"open", []option{{"kind", "outside"}}, 0, true},
		{"opne", nil, 0, false},
	} {
		sum, err := sumOf([]byte(text), test.name, test.labels)
		if sum != test.sum || (err == nil) != test.ok {
			t.Errorf("%s %v: got %v, %v, want %v, ok %v", test.name, test.labels, sum, err, test.sum, test.ok)
		}
	}
}
