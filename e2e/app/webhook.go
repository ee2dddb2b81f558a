package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
)

// review is as much of an AdmissionReview as is needed to answer one.
type review struct {
	APIVersion string          `json:"apiVersion"`
	Kind       string          `json:"kind"`
	Request    *reviewRequest  `json:"request,omitempty"`
	Response   *reviewResponse `json:"response,omitempty"`
}

type reviewRequest struct {
	UID  string `json:"uid"`
	Name string `json:"name"`
}

type reviewResponse struct {
	UID     string        `json:"uid"`
	Allowed bool          `json:"allowed"`
	Status  *reviewStatus `json:"status,omitempty"`
}

type reviewStatus struct {
	Message string `json:"message"`
}

// webhook is an admission webhook: whatever is called forbidden is.
func webhook(ctx context.Context, address, cert, key string) error {
	return serveHTTP(ctx, address, http.HandlerFunc(admit), cert, key)
}

func admit(w http.ResponseWriter, r *http.Request) {
	var about review
	if err := json.NewDecoder(r.Body).Decode(&about); err != nil || about.Request == nil {
		http.Error(w, fmt.Sprint("no AdmissionReview: ", err), http.StatusBadRequest)
		return
	}
	answer := reviewResponse{UID: about.Request.UID, Allowed: about.Request.Name != "forbidden"}
	if !answer.Allowed {
		answer.Status = &reviewStatus{"forbidden, says the webhook to " + r.RemoteAddr}
	}
	about.Request, about.Response = nil, &answer
	_ = json.NewEncoder(w).Encode(about) // a client that hangs up is no error
}
