from django.contrib import admin
from django.contrib.staticfiles.urls import staticfiles_urlpatterns
from django.urls import include, path

urlpatterns = [
    path("admin/", admin.site.urls),
    path("", include("visits.urls")),
    *staticfiles_urlpatterns(),  # serves the admin's style sheets, and only while DEBUG is on
]
