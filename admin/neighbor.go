package admin

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
)

const (
	// gatherLimit is what another process may take to tell its metrics when ours are asked for.
	gatherLimit = 3 * time.Second
	// processLabel names the process that a metric is of, if it is not the one that is asked.
	processLabel = "process"
)

// neighbor is another process of the same pod, which serves metrics.
type neighbor struct{ transport *http.Transport }

func newNeighbor(addr string) neighbor {
	return neighbor{&http.Transport{
		DisableKeepAlives: true, ResponseHeaderTimeout: headerLimit,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return Dial(ctx, addr) },
	}}
}

// ask asks for the metrics, and for nothing else. Whoever asks closes the body.
func (n neighbor) ask(ctx context.Context) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://beside/metrics", nil)
	if err != nil {
		return nil, err
	}
	return n.transport.RoundTrip(req)
}

// gatherFrom is the metrics of the process at addr, with a label that names it: the runtime's are
// called as our own are. One that does not answer has none; that it is away, other metrics tell.
func gatherFrom(name, addr string) prometheus.Gatherer {
	n := newNeighbor(addr)
	return prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
		ctx, cancel := context.WithTimeout(context.Background(), gatherLimit)
		defer cancel()
		resp, err := n.ask(ctx)
		if err != nil {
			return nil, nil
		}
		defer resp.Body.Close()
		families, err := decodeFamilies(io.LimitReader(resp.Body, metricsLimit), expfmt.ResponseFormat(resp.Header))
		if err != nil || resp.StatusCode != http.StatusOK {
			return nil, nil
		}
		for _, f := range families {
			for _, m := range f.Metric {
				label, value := processLabel, name
				m.Label = append(m.Label, &dto.LabelPair{Name: &label, Value: &value})
			}
		}
		return families, nil
	})
}

func decodeFamilies(r io.Reader, format expfmt.Format) (families []*dto.MetricFamily, err error) {
	d := expfmt.NewDecoder(r, format)
	for {
		f := &dto.MetricFamily{}
		if err := d.Decode(f); errors.Is(err, io.EOF) {
			return families, nil
		} else if err != nil {
			return nil, err
		}
		families = append(families, f)
	}
}
